-- Stores a loaded value, only while the lease is still the loader's. An invalidation of the key takes the lease away,
-- and so do a set, and another loader after the lease has expired. A value that is dead already (another epoch, a tag
-- invalidated since the load began) is not stored, nor one that may be dead (a pattern was marked and dropped since:
-- `*`): no reader could use it, and reclaim may have passed.
-- KEYS  1 entry  2 lease  3 clock  4 marks  5 its other place  6… indexes of its tags
-- ARGV  1 the lease's value  2 epoch  3 stamp: the clock before the load began  4 name  5 body  6 ttl ms
--       7 life ms  8 release  9… the marks `t:<tag>` of its tags
-- returns 1 stored, 0 the lease is lost, -1 dead already
-- include: clock entry places

-- The reply to a commit may be lost, and the commit sent again: it has freed the lease, and its value is there.
local function has_stored(place)
  local text, head = redis.pcall('GET', place), '1\t' .. ARGV[2] .. '\t' .. ARGV[3] .. '\t'
  return type(text) == 'string' and string.sub(text, 1, #head) == head and string.sub(text, -#ARGV[5]) == ARGV[5]
end

if redis.call('GET', KEYS[2]) ~= ARGV[1] then
  return (has_stored(KEYS[1]) or has_stored(KEYS[5])) and 1 or 0
end
redis.call('DEL', KEYS[2])
local stamp = tonumber(ARGV[3])
if known_clock(KEYS[3]) ~= ARGV[2] or tonumber(redis.call('ZSCORE', KEYS[4], '*') or '0') > stamp then
  return -1
end
for i = 9, #ARGV do
  if tonumber(redis.call('ZSCORE', KEYS[4], ARGV[i]) or '0') > stamp then
    return -1
  end
end
local place = place_of(KEYS[1], KEYS[5], ARGV[8], ARGV[2])
local name = string.sub(place, #KEYS[1] - #ARGV[4] + 1)
write_entry(place, ARGV[2], ARGV[3], ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7]), name, 6)
return 1
