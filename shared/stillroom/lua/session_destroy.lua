-- Ends a session. Takes no memory, so it works on a server that is full.
-- KEYS  1… record, under each pepper
-- ARGV  1 prefix  2 how long ago it was asked for, µs: a name that was rotated since still counts
-- returns {1} ended, {0} there was none that lived, or {0, how long before it was asked for the grace of this name was over, µs}
-- include: clock session session_index

local now = now_us()
local session, _, dead, late = find(ARGV[1], now, KEYS, now - tonumber(ARGV[2]), HOPS_TO_END)
if session or dead then
  drop(ARGV[1], session or dead)
end
return {session and 1 or 0, late and plain(late)}
