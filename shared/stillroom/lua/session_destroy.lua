-- Ends a session. Takes no memory, so it works on a server that is full.
-- KEYS  1… record, under each pepper
-- ARGV  1 prefix  2 when it was asked for, µs, if that was before now: a name that was rotated since still counts
--       3 the response to this 1 takes the cookie away if there was a session, 2 brings another one; 0 neither
-- returns 1 ended, 0 there was none that lived
-- include: clock session

local now = now_us()
local session, _, dead = find(ARGV[1], now, KEYS, math.min(now, tonumber(ARGV[2]) or now))
if session or dead then
  drop(ARGV[1], session or dead)
end
if ARGV[3] == '2' or (session and ARGV[3] == '1') then
  mark_late(ARGV[1], KEYS[1], session)
end
return session and 1 or 0
