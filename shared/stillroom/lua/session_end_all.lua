-- Ends all sessions of this shard: they are dead from now on (`all`). Those in x go to a list of their own, for
-- workers to delete.
-- KEYS  1 x
-- ARGV  1 prefix  2 how long the longest session lives, ms, where x does not tell
-- returns how many there were, with those that had ended and were not swept
-- flags: allow-oom
-- include: time session session_index

local prefix, now = ARGV[1], now_us()
local all, x = prefix .. 'all', KEYS[1]
local count = asked_of('ZCARD', x)
if not count then
  redis.call('UNLINK', x) -- a stranger's key must not save its shard from the end
  count = 0
end
local life = math.max(redis.call('PTTL', x), redis.call('PTTL', all), tonumber(ARGV[2]))
local stamp = next_stamp(prefix, now, life)
redis.call('SET', all, stamp, 'PX', plain(life))
if count > 0 then
  local list = 'x:' .. stamp
  redis.call('RENAME', x, prefix .. list)
  redis.call('ZADD', prefix .. 'rev', stamp, list)
  keep_for(prefix .. 'rev', life)
end
return count
