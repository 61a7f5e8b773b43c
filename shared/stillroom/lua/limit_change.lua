-- Changes a limit for some time, or ends the change.
-- KEYS  1 changes
-- ARGV  1 limit  2 quota, '' to end it  3 window, s  4 for how long, s  5 the person  6 most names
-- returns 1 done, 0 there was no change to end, -1 too many limits are changed
-- include: time
-- flags: allow-oom

local now = math.floor(now_us() / 1000000)

-- Drops changes that are over. The key lives as long as the change that ends last.
local function prune()
  local last, all = 0, redis.call('HGETALL', KEYS[1])
  for i = 1, #all, 2 do
    local till = tonumber(string.match(all[i + 1], '"until":(%d+)') or '') or 0
    if till <= now then
      redis.call('HDEL', KEYS[1], all[i])
    end
    last = math.max(last, till)
  end
  if last > now then
    redis.call('EXPIRE', KEYS[1], plain(last - now + 1))
  end
end

prune()
if ARGV[2] == '' then
  local was_changed = redis.call('HDEL', KEYS[1], ARGV[1])
  prune()
  return was_changed
end
if redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[6]) and not redis.call('HGET', KEYS[1], ARGV[1]) then
  return -1
end
redis.call('HSET', KEYS[1], ARGV[1], cjson.encode({
  quota = tonumber(ARGV[2]), window = tonumber(ARGV[3]), since = now, ['until'] = now + tonumber(ARGV[4]), by = ARGV[5],
}))
prune()
return 1
