-- Takes the work that is due the longest. It stays written down and becomes due again, should its worker die.
-- Work that is due later than the longest delay was written before the clock was put back: it is due now.
-- KEYS  1 todo
-- ARGV  1 ms until it is due again  2 the longest delay, ms
-- returns {member, the due time that says it is ours, server time in µs}, or nil if nothing is due
-- flags: allow-oom
-- include: time

local now = now_us()
local now_ms = math.floor(now / 1000)
local member = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', plain(now_ms), 'LIMIT', 0, 1)[1]
if not member then
  local latest = plain(now_ms + math.max(tonumber(ARGV[1]), tonumber(ARGV[2])))
  member = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. latest, '+inf', 'LIMIT', 0, 1)[1]
end
if not member then
  return false
end
local due = plain(now_ms + tonumber(ARGV[1]))
redis.call('ZADD', KEYS[1], due, member)
return {member, due, plain(now)}
