-- Ends all sessions of a user or a tag. A few are deleted here; if there are more, all are dead from now on
-- (`rev`), and a worker deletes them.
-- KEYS  1 index
-- ARGV  1 prefix  2 u:<user> or g:<tag>  3 most to delete here  4… h to keep, under each pepper
-- returns {how many it names, 1 if there is work left}
-- include: clock session

local prefix, most, kept = ARGV[1], tonumber(ARGV[3]), nil
for i = 4, #ARGV do
  if redis.call('ZSCORE', KEYS[1], ARGV[i]) then
    kept = read(prefix, ARGV[i])
  end
end
local count = redis.call('ZCARD', KEYS[1]) - (kept and 1 or 0)
local names = redis.call('ZRANGE', KEYS[1], 0, most)
for i = 1, math.min(#names, most) do
  if not (kept and kept.h == names[i]) then
    local session = read(prefix, names[i])
    if session then
      drop(prefix, session)
    else
      redis.call('ZREM', KEYS[1], names[i]) -- its record is gone; the sweep cleans up after it elsewhere
    end
  end
end
if #names <= most then
  return {count, 0}
end

local now = now_us()
redis.call('ZADD', prefix .. 'rev', plain(next_stamp(prefix, now)), ARGV[2])
keep_for(prefix .. 'rev', redis.call('PTTL', KEYS[1]))
if kept then
  local stamp = plain(next_stamp(prefix, now))
  redis.call('HSET', kept.key, '_s', stamp)
  redis.call('ZADD', prefix .. 'u:' .. kept.user, 'XX', stamp, kept.h)
  for tag in each_line(kept.tags) do
    redis.call('ZADD', prefix .. 'g:' .. tag, 'XX', stamp, kept.h)
  end
end
return {count, 1}
