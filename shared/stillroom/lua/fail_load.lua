-- Frees the lease of a failed load, and tells the error to the callers that waited for this load.
-- KEYS  1 lease  2 failure
-- ARGV  1 the lease's value  2 the error, as JSON  3 how long it is told, ms
-- returns 1 told, 0 the lease was not ours: no caller waits for this load any more

if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[2], ARGV[1] .. ' ' .. ARGV[2], 'PX', ARGV[3])
return 1
