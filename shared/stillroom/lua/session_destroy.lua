-- Ends a session. It takes no memory, so it works on a server that is full.
-- KEYS  1… record, under each pepper
-- ARGV  1 prefix  2 how long ago it was asked for, µs: a name that was rotated since still counts
--       3 the response: 1 takes the cookie away if there was a session, 2 brings another cookie, 0 neither
--       4 1: end it only if it has no data, '' otherwise
-- returns {1} ended, {0} there was none that lived, or {0, how long before it was asked for the grace of this name was over, µs}
-- include: time session session_index

local now = now_us()
local session, _, dead, late, old = find(ARGV[1], now, KEYS, now - tonumber(ARGV[2]), HOPS_TO_END)

local found = session or dead -- which another login may have taken out of use, and may give back: see session_hold
if ARGV[4] == '1' and found and redis.call('HGET', found.key, '_b') ~= '0' then -- bytes of data
  return {0}
end
note_end(ARGV[1], old)
if found then
  drop(ARGV[1], found)
end
if ARGV[3] == '2' or (session and ARGV[3] == '1') then
  mark_late(ARGV[1], KEYS[1], session)
end
return {session and 1 or 0, late and plain(late)}
