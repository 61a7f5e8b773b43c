-- Writes a key of a shard of the sessions that is on its way here, and nothing once the shard is open: another move has
-- gone on with it while this one stood still.
-- KEYS  1 rev  2 the key
-- ARGV  1 a command  2… what it says behind the key
-- returns 1 written, 0 the shard is not on its way

if not redis.call('ZSCORE', KEYS[1], '!arriving') then
  return 0
end
redis.call(ARGV[1], KEYS[2], unpack(ARGV, 2))
return 1
