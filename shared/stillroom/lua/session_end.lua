-- Ends one session of a user by its name in Redis, which is no secret; another user's is left alone.
-- The name opens nothing, so an old name counts long after its grace: the list that showed it may be minutes old.
-- KEYS  1 record
-- ARGV  1 prefix  2 user
-- returns 1 ended, 0 there was none that lived
-- include: time session session_index

local session, _, dead = find(ARGV[1], now_us(), KEYS, 0, HOPS_TO_END)
local found = session or dead
if not found or found.user ~= ARGV[2] then
  return 0
end
drop(ARGV[1], found)
return session and 1 or 0
