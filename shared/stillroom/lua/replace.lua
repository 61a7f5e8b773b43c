-- Replaces an entry that is still the one the caller has read: by a value made from it, or by the same with another
-- end. It keeps its stamp, for it is as old as what it was made from: an invalidation in between means it too.
-- KEYS  1 entry  2 lease  3… indexes of its tags
-- ARGV  1 how it begins  2 epoch  3 stamp  4 name  5 body  6 ttl ms, '' to keep its end  7 life ms
-- returns 1 replaced, 0 another is there now, or none
-- include: clock entry

if redis.pcall('GETRANGE', KEYS[1], 0, #ARGV[1] - 1) ~= ARGV[1] then
  return 0
end
local ttl, life = tonumber(ARGV[6]), tonumber(ARGV[7])
if not ttl then
  local fresh_until = string.match(ARGV[1], '^1\t%w+\t%d+\t(%d+)\t')
  ttl, life = tonumber(fresh_until) - math.floor(now_us() / 1000), redis.call('PTTL', KEYS[1])
end
write_entry(KEYS[1], ARGV[2], ARGV[3], ARGV[5], ttl, math.max(life, 1), ARGV[4], 3)
redis.call('DEL', KEYS[2]) -- a load that is under way began with an older value
return 1
