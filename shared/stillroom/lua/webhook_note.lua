-- Notes how far the webhook was told, or when it is tried again.
-- KEYS  1 how far
-- ARGV  1 how long that is kept, s  2… field, value …
-- returns 1
-- flags: allow-oom

redis.call('EXPIRE', KEYS[1], ARGV[1]) -- the first write takes no memory: see lib/hits
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
