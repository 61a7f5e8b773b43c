-- Sets and removes keys of a living session. It never begins one, so a slower request does not undo a logout.
-- KEYS  1… record, under each pepper
-- ARGV  1 prefix  2 the version it must have, '' for any  3 most bytes  4 most keys  5 number of keys to set
--       6… key, JSON, key, JSON … then the keys to remove
-- returns {'ok', version, h}, {'conflict', version}, {'large', bytes}, {'many', keys}, {'unreadable'} its version is
--         none, or the reason: see session_get
-- include: time session

local now = now_us()
local session, refusal = find(ARGV[1], now, KEYS)
if not session then
  return refusal
end
local held = redis.call('HMGET', session.key, '_v', '_b', '_a')
local version, bytes = number(held[1]), number(held[2])
if not version then
  return {'unreadable'}
end
if ARGV[2] ~= '' and ARGV[2] ~= held[1] then
  return {'conflict', version}
end

-- Counts the bytes of the data anew, where what the record says of them is none: it would refuse all that is written.
local function counted()
  local all, sum = redis.call('HGETALL', session.key), 0
  for i = 1, #all, 2 do
    if string.byte(all[i]) ~= 95 then -- _
      sum = sum + #all[i] + #all[i + 1]
    end
  end
  return sum
end

local removed_from = 6 + 2 * tonumber(ARGV[5])
local most, keys, more, final = tonumber(ARGV[3]), 0, 0, {}
for i = 6, removed_from - 1, 2 do
  final[ARGV[i]] = #ARGV[i] + #ARGV[i + 1]
end
for i = removed_from, #ARGV do
  final[ARGV[i]] = 0
end
for key, size in pairs(final) do
  local had = redis.call('HEXISTS', session.key, key)
  more = more + size - (had == 1 and #key + redis.call('HSTRLEN', session.key, key) or 0)
  keys = keys + (size > 0 and 1 or 0) - had
end
local reserved = held[3] and 11 or 10
local count = redis.call('HLEN', session.key) - reserved + keys
if not bytes or bytes < 0 or bytes + more > most then
  bytes = counted()
end
bytes = bytes + more
if bytes > most then
  return {'large', bytes}
end
if count > tonumber(ARGV[4]) then
  return {'many', count}
end

redis.call('HSET', session.key, '_v', plain(version + 1), '_b', plain(bytes), unpack(ARGV, 6, removed_from - 1))
if removed_from <= #ARGV then
  redis.call('HDEL', session.key, unpack(ARGV, removed_from))
end
see(session, now)
return {'ok', version + 1, session.h}
