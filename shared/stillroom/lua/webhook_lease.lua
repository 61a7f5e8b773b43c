-- Leases the webhook to one worker, and tells how far it was told. May be sent again.
-- A lease with more time left than it was given is from before the clock was put back, and over: see lib/lease.
-- KEYS  1 lease  2 how far
-- ARGV  1 the worker's token  2 how long the lease lasts, ms  3 how long `how far` is kept, s
-- returns {whose lease it is, {field, value …}}
-- flags: allow-oom

if redis.call('PTTL', KEYS[1]) > tonumber(ARGV[2]) then
  redis.call('DEL', KEYS[1])
end
redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2])
local holder = redis.call('GET', KEYS[1])
if holder == ARGV[1] then
  redis.call('HSET', KEYS[2], 'teller', ARGV[1])
  redis.call('EXPIRE', KEYS[2], ARGV[3])
end
return {holder, redis.call('HGETALL', KEYS[2])}
