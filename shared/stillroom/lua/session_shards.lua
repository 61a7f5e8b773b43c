-- Says how many shards a process has. Who speaks of all sessions of a user or a tag asks the most that were ever said.
-- KEYS  1 number of shards
-- ARGV  1 shards of this process  2 how long it is remembered, ms
-- returns the most that were said
-- flags: allow-oom

local most = tonumber(redis.call('MGET', KEYS[1])[1] or '') or 0
if tonumber(ARGV[1]) > most then
  most = tonumber(ARGV[1])
  redis.call('SET', KEYS[1], most, 'PX', ARGV[2])
else
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return most
