-- Reads a session, and remembers that it was seen unless that was written down a moment ago. It writes no index, unless
-- one is lost.
-- KEYS  1… record, under each pepper
-- ARGV  1 prefix  2 µs between two touches, '' to leave it untouched
-- returns {'ok', h, the record's own fields, its data, µs since it was written down that it was seen}
--         (less than 0 where the clock has stepped back since)
--         {'missing' | 'expired' | 'revoked'}, or {'replayed', h, user}
-- include: time session

local now = now_us()
local session, refusal = find(ARGV[1], now, KEYS)
if not session then
  return refusal
end
local unseen = ARGV[2] ~= '' and touch(session, now, tonumber(ARGV[2])) or now - session.seen
local found = answer(session.h, session.key)
found[5] = unseen
return found
