-- Ends a session. Takes no memory, so it works on a server that is full.
-- KEYS  1… record, under each pepper
-- ARGV  1 prefix
-- returns 1 ended, 0 there was none that lived
-- include: clock session

local session, _, dead = find(ARGV[1], now_us())
if session or dead then
  drop(ARGV[1], session or dead)
end
return session and 1 or 0
