-- Adds some counts to others, and deletes them.
-- KEYS  1 counts
-- ARGV  1… a field, and the field that it is added to
-- returns how many fields are gone
-- flags: allow-oom

for n = 1, #ARGV, 2 do
  local count = redis.call('HGET', KEYS[1], ARGV[n])
  if count then
    redis.call('HDEL', KEYS[1], ARGV[n])
    redis.call('HINCRBY', KEYS[1], ARGV[n + 1], count)
  end
end
return #ARGV / 2
