-- Stores the caller's value, stamped with the current clock, and frees the lease: a load under way began earlier and
-- must not overwrite it. Every release of the app reads this value.
-- A write that arrives after its caller gave up is refused: it could follow an invalidation.
-- KEYS  1 entry  2 lease  3 clock  4 marks  5 its other place  6 registry of the keys that are kept near
--       7 the names that changed  8… indexes of its tags
-- ARGV  1 epoch to begin  2 while the caller waits (see is_late)  3 name: the entry's key without its prefix  4 body
--       5 ttl ms  6 life ms
-- returns 1 stored, -1 too late
-- include: clock entry near in_time

if is_late(ARGV[2]) then
  return -1
end
local epoch, seq = read_clock(KEYS[3], KEYS[4], ARGV[1])
write_entry(KEYS[1], epoch, plain(seq), ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[3], 8)
redis.call('UNLINK', KEYS[5])
redis.call('DEL', KEYS[2])
name_changed(KEYS[6], KEYS[7], KEYS[3], KEYS[4], ARGV[1], {ARGV[3]})
return 1
