-- Does nothing. That it runs shows that this server runs scripts, and takes these keys in one call.
-- KEYS  any number
-- ARGV  none
-- returns 1

return 1
