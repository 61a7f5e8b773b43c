-- Remembers that a session was seen, unless that was written down a moment ago.
-- KEYS  1… record, under each pepper
-- ARGV  1 prefix  2 µs between two touches
-- returns {'ok'}, or the reason: see session_get
-- include: time session

local now = now_us()
local session, refusal = find(ARGV[1], now, KEYS)
if not session then
  return refusal
end
touch(session, now, tonumber(ARGV[2]))
return {'ok'}
