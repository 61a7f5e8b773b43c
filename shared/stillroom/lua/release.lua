-- Frees a lease, only while it is still the caller's.
-- KEYS  1 lease
-- ARGV  1 the lease's value, or how it begins, with its token
-- returns 1 freed, 0 it was not ours
-- flags: allow-oom

if string.sub(redis.call('GET', KEYS[1]) or '', 1, #ARGV[1]) ~= ARGV[1] then
  return 0
end
return redis.call('DEL', KEYS[1])
