-- Replaces an entry that is still the one the caller has read: by a value made from it, or by the same with another
-- end. It keeps its stamp, for it is as old as what it was made from: an invalidation in between means it too.
-- Patterns that came after the caller's look are tried by each reader; one that was dropped meanwhile (`*`) by nobody.
-- KEYS  1 entry  2 lease  3 clock  4 marks  5 registry of what is kept near  6 the names that changed
--       7… indexes of its tags
-- ARGV  1 how it begins  2 epoch  3 stamp  4 name  5 body  6 ttl ms, '' to keep its end  7 life ms
--       8 while the caller waits (see is_late)  9 seq of the clock that the caller read with it
--       10 '1': the value is another, and a load that is under way must not overwrite it
--       11 epoch to begin if the clock or the marks are lost  12 the key's name, in whichever place
-- returns 1 replaced, 0 another is there now, or none, or look again, -1 too late
-- include: time clock entry near

if is_late(ARGV[8]) then
  return -1
end
if redis.pcall('GETRANGE', KEYS[1], 0, #ARGV[1] - 1) ~= ARGV[1] then
  return 0
end
if tonumber(redis.call('ZSCORE', KEYS[4], '*') or '0') > tonumber(ARGV[9]) then
  return 0
end
local ttl, life = tonumber(ARGV[6]), tonumber(ARGV[7])
if not ttl then
  local fresh_until = string.match(ARGV[1], '^1\t%w+\t%d+\t(%d+)\t')
  ttl, life = tonumber(fresh_until) - math.floor(now_us() / 1000), redis.call('PTTL', KEYS[1])
end
write_entry(KEYS[1], ARGV[2], ARGV[3], ARGV[5], ttl, math.max(life, 1), ARGV[4], 7)
if ARGV[10] == '1' then
  redis.call('DEL', KEYS[2])
end
name_changed(KEYS[5], KEYS[6], KEYS[3], KEYS[4], ARGV[11], {ARGV[12]})
return 1
