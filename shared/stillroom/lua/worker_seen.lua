-- Writes down that a worker is at work, and its description. Workers that were silent for a while are forgotten.
-- KEYS  1 workers  2 workers:about
-- ARGV  1 the worker's name  2 how long it is remembered, ms  3 its description, JSON, or nothing
-- returns 1
-- include: time own
-- flags: allow-oom

local now = math.floor(now_us() / 1000)
local before, since = plain(now - tonumber(ARGV[2])), '(' .. plain(now)
own(KEYS[1], 'zset')
own(KEYS[2], 'hash')
local function forget(from, till)
  local gone = redis.call('ZRANGEBYSCORE', KEYS[1], from, till)
  for _, worker in ipairs(gone) do
    redis.call('ZREM', KEYS[1], worker)
    redis.call('HDEL', KEYS[2], worker)
  end
end
forget('-inf', before)
forget(since, '+inf') -- written before the clock stepped back
redis.call('ZADD', KEYS[1], plain(now), ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
if ARGV[3] ~= '' then
  redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
  redis.call('PEXPIRE', KEYS[2], ARGV[2])
end
return 1
