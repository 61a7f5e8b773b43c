-- Replaces the entry that the caller has read, if it is still there: by a value made from it, or by the same value with
-- another end. The new entry keeps the stamp of the old, so that an invalidation in between kills it too.
-- Each reader tries the patterns that came after the caller's look, but no reader one that was dropped meanwhile (`*`).
-- KEYS  1 entry  2 lease  3 clock  4 marks  5 registry of the keys that are kept near  6 the names that changed
--       7… indexes of its tags
-- ARGV  1 the entry's first bytes  2 epoch  3 stamp  4 name  5 body  6 ttl ms, '' to keep its end  7 life ms
--       8 while the caller waits (see is_late)  9 seq of the clock that the caller read with it
--       10 '1': the value is another, and a load that is under way must not overwrite it
--       11 epoch to begin if the clock or the marks are lost  12 the key's name, in whichever place
-- returns 1 replaced, 0 another entry is there now, or none, or the caller has to look again, -1 too late
-- include: clock entry near in_time

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
