-- Bans a subject because a person says so.
-- KEYS  1 ban  2 bans
-- ARGV  1 subject  2 for how long, ms  3 reason
-- returns {since, until} in ms
-- flags: allow-oom
-- include: clock ban

local now = math.floor(now_us() / 1000)
local ms = tonumber(ARGV[2])
write_ban(KEYS[1], KEYS[2], ARGV[1], now, ms, {rule = '', level = 0, by = 'operator', reason = ARGV[3]})
return {plain(now), plain(now + ms)}
