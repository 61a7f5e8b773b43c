-- The living sessions of a user in this shard, without their data; forgets those whose record is gone.
-- KEYS  1 user index
-- ARGV  1 prefix
-- returns {h, what the record says of itself, h …}
-- include: clock session

local prefix, now, found = ARGV[1], now_us(), {}
for _, h in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local session = read(prefix, h)
  if not session then
    redis.call('ZREM', KEYS[1], h)
  elseif lives(prefix, session, now) then
    found[#found + 1] = h
    found[#found + 1] = own_of(session.key)
  end
end
return found
