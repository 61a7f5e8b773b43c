-- Takes the lease for a load: one loader per key. It overrides refresh, working and backoff leases, because the reader
-- has no value to serve.
-- KEYS  1 lease  2 entry  3 clock  4 marks  5 the other place
-- ARGV  1 load.<token>.<lease ms>  2 lease ms  3 epoch to begin  4 while the caller waits (see is_late)
--       5 '1': take the lease from an older load, whose value would be too old
-- returns {1, clock, entry or nil, foreign, other or nil} when the lease is taken: the clock is the load's stamp;
--         another loader may have stored these entries since the caller looked; foreign = 1 if the key holds no string
--         {0, holder} when another load holds it
--         {-1} when the caller has given up before this arrived: a lease without an owner would make
--         everybody wait for nothing
-- include: clock lease in_time

if is_late(ARGV[4]) then
  return {-1}
end
local holder = redis.call('GET', KEYS[1])
if holder and string.sub(holder, 1, 5) == 'load.' and ARGV[5] ~= '1' and holds(KEYS[1], holder, ARGV[2]) then
  return {0, holder}
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local _, _, clock = read_clock(KEYS[3], KEYS[4], ARGV[3])
local kind = redis.call('TYPE', KEYS[2]).ok
local other = redis.call('TYPE', KEYS[5]).ok == 'string' and redis.call('GET', KEYS[5])
if kind == 'string' then
  return {1, clock, redis.call('GET', KEYS[2]), 0, other}
end
return {1, clock, false, kind == 'none' and 0 or 1, other}
