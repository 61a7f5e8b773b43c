-- Claims an ordered refresh for a worker. Claiming changes the lease, so that a task that is delivered twice, or late,
-- finds nothing to do.
-- KEYS  1 lease  2 entry  3 clock  4 marks  5 the other place
-- ARGV  1 token (hexadecimal)  2 lease ms  3 epoch to begin
-- returns {working.<token>.<lease ms>.<failures>, clock, entry or nil, other or nil}; nil if the lease is another's
-- include: clock

local holder = redis.call('GET', KEYS[1])
local failures = string.match(holder or '', '^refresh%.' .. ARGV[1] .. '%.%d+%.(%d+)$')
if not failures then
  return false
end
local value = 'working.' .. ARGV[1] .. '.' .. ARGV[2] .. '.' .. failures
redis.call('SET', KEYS[1], value, 'PX', ARGV[2])
local _, _, clock = read_clock(KEYS[3], KEYS[4], ARGV[3])
local entry = redis.call('TYPE', KEYS[2]).ok == 'string' and redis.call('GET', KEYS[2])
local other = redis.call('TYPE', KEYS[5]).ok == 'string' and redis.call('GET', KEYS[5])
return {value, clock, entry, other}
