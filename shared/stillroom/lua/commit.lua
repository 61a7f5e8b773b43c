-- Stores what a load brought, only while the lease is still the loader's: an invalidation of the key,
-- a set, or another loader after the lease ran out has taken it away.
-- KEYS  1 entry  2 lease
-- ARGV  1 the lease's value  2 epoch  3 stamp: the clock before the load began  4 body  5 ttl ms  6 life ms
-- returns 1 stored, 0 the lease is lost
-- include: clock entry

if redis.call('GET', KEYS[2]) ~= ARGV[1] then
  return 0
end
write_entry(KEYS[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6])
redis.call('DEL', KEYS[2])
return 1
