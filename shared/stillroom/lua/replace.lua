-- Replaces an entry that is still the one the caller has read: by a value made from it, or by the same with another
-- end. It keeps its stamp, for it is as old as what it was made from: an invalidation in between means it too.
-- Patterns that came after the caller's look are tried by each reader; one that was dropped meanwhile (`*`) by nobody.
-- KEYS  1 entry  2 lease  3 marks  4… indexes of its tags
-- ARGV  1 how it begins  2 epoch  3 stamp  4 name  5 body  6 ttl ms, '' to keep its end  7 life ms
--       8 while the caller waits (see is_late)  9 seq of the clock that the caller read with it
--       10 '1': the value is another, and a load that is under way must not overwrite it
-- returns 1 replaced, 0 another is there now, or none, or look again, -1 too late
-- include: time entry

if is_late(ARGV[8]) then
  return -1
end
if redis.pcall('GETRANGE', KEYS[1], 0, #ARGV[1] - 1) ~= ARGV[1] then
  return 0
end
if tonumber(redis.call('ZSCORE', KEYS[3], '*') or '0') > tonumber(ARGV[9]) then
  return 0
end
local ttl, life = tonumber(ARGV[6]), tonumber(ARGV[7])
if not ttl then
  local fresh_until = string.match(ARGV[1], '^1\t%w+\t%d+\t(%d+)\t')
  ttl, life = tonumber(fresh_until) - math.floor(now_us() / 1000), redis.call('PTTL', KEYS[1])
end
write_entry(KEYS[1], ARGV[2], ARGV[3], ARGV[5], ttl, math.max(life, 1), ARGV[4], 4)
if ARGV[10] == '1' then
  redis.call('DEL', KEYS[2])
end
return 1
