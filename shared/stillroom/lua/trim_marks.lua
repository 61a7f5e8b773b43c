-- Drops the marks that are older than any entry can be, and remembers up to where (`!`): what is stamped
-- before that is dead without a mark.
-- KEYS  1 clock  2 marks  3 globs
-- ARGV  1 age µs: the longest life of an entry and of the load before it  2 most marks to drop in one call
-- returns {marks dropped, marks left}
-- flags: allow-oom
-- include: clock

local value = redis.call('GET', KEYS[1])
local epoch = value and string.match(value, '^(.*)%.')
local newest = epoch and redis.call('ZSCORE', KEYS[2], '~' .. epoch)
if not newest then
  return {0, redis.call('ZCARD', KEYS[2])}
end
local bound = plain(math.min(now_us() - tonumber(ARGV[1]), tonumber(newest)))
local old = redis.call('ZRANGE', KEYS[2], '-inf', '(' .. bound, 'BYSCORE', 'LIMIT', 0, ARGV[2], 'WITHSCORES')
local dropped, youngest = 0, nil
for i = 1, #old, 2 do
  if old[i] ~= '!' and old[i] ~= '~' .. epoch then
    dropped = dropped + redis.call('ZREM', KEYS[2], old[i])
    youngest = old[i + 1]
  end
end
if youngest then
  -- Not the bound: after a quiet time the youngest entries are stamped before it, and no mark that is gone
  -- could have named them.
  redis.call('ZADD', KEYS[2], 'GT', youngest, '!')
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', youngest)
end
return {dropped, redis.call('ZCARD', KEYS[2])}
