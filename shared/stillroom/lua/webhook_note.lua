-- Notes how far the webhook was told, or when it is tried again, unless another worker has begun to tell it since.
-- KEYS  1 how far
-- ARGV  1 the worker's token  2 how long that is kept, s  3… field, value …
-- returns 1 noted, 0 another worker has begun
-- flags: allow-oom

if redis.call('HGET', KEYS[1], 'teller') ~= ARGV[1] then
  return 0
end
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
redis.call('EXPIRE', KEYS[1], ARGV[2])
return 1
