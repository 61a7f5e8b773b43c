-- Drops the patterns that a sweep of the whole keyspace was complete for: their marks are older than any load that
-- could still store what they name, so nothing they could kill is left, or will come.
-- KEYS  1 marks  2 globs
-- ARGV  1 when the sweep began (server time, µs)  2 the longest lease, µs
-- returns {patterns dropped, seq of the newest that is left or nil}
-- flags: allow-oom
-- include: clock

local bound = plain(tonumber(ARGV[1]) - tonumber(ARGV[2]))
local old = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', '(' .. bound)
for _, glob in ipairs(old) do
  redis.call('ZREM', KEYS[2], glob)
  redis.call('ZREM', KEYS[1], 'p:' .. glob)
end
local newest = redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')[2]
if newest then
  redis.call('ZADD', KEYS[1], newest, '?')
elseif #old > 0 then
  redis.call('ZREM', KEYS[1], '?')
end
return {#old, newest or false}
