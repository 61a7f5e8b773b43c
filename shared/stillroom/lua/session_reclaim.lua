-- Deletes sessions that were revoked, for the oldest revocation of this shard, and takes it off the list when done.
-- KEYS  1 rev
-- ARGV  1 prefix  2 most to delete
-- returns {how many were deleted, how many revocations are left, how long the oldest has waited, µs}
-- include: time session session_index

local prefix, most = ARGV[1], tonumber(ARGV[2])
local oldest = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if not oldest[1] then
  return {0, 0, 0}
end
local index = prefix .. oldest[1]
local names, found = {}, {}

-- All sessions were ended, so every session on this list is dead.
local function take_listed()
  names = redis.call('ZRANGE', index, 0, most - 1)
  for _, member in ipairs(names) do
    found[#found + 1] = read_member(member)
    redis.call('ZREM', index, member)
  end
end

local function take_revoked()
  names = redis.call('ZRANGEBYSCORE', index, '-inf', oldest[2], 'LIMIT', 0, most)
  for _, h in ipairs(names) do
    local session = read_record(prefix, h)
    if session then
      found[#found + 1] = session
    else
      redis.call('ZREM', index, h)
    end
  end
end

if string.sub(oldest[1], 1, 2) == 'x:' then
  take_listed()
else
  take_revoked()
end
drop_all(prefix, found)
if #names < most then
  redis.call('ZREM', KEYS[1], oldest[1])
end
return {#names, redis.call('ZCARD', KEYS[1]), math.max(0, now_us() - tonumber(oldest[2]))}
