-- Drops the patterns that a sweep of the whole keyspace was complete for. Their marks are older than any load that
-- could still store a matching entry, so no entry that they kill is left, and none will come. An entry may come all the
-- same (a process with longer leases, a clock that stepped, a machine that stood still). So `*` in the marks tells how
-- far patterns were dropped: an entry older than that is not stored, and a copy that a process has read before that is
-- not served.
-- KEYS  1 marks  2 globs
-- ARGV  1 when the sweep began (server time, µs)  2 the longest lease, µs
-- returns {patterns dropped, seq of the newest that is left or nil}
-- flags: allow-oom
-- include: time

local bound = plain(tonumber(ARGV[1]) - tonumber(ARGV[2]))
local old = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', '(' .. bound, 'WITHSCORES')
for i = 1, #old, 2 do
  redis.call('ZREM', KEYS[2], old[i])
  redis.call('ZREM', KEYS[1], 'p:' .. old[i])
end
local newest = redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')[2]
if newest then
  redis.call('ZADD', KEYS[1], newest, '?')
elseif #old > 0 then
  redis.call('ZREM', KEYS[1], '?')
end
if #old > 0 then
  redis.call('ZADD', KEYS[1], 'GT', old[#old], '*')
end
return {#old / 2, newest or false}
