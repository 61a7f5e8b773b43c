-- Deletes keys and the leases of their loads under way, and tells processes that keep copies. The leases go first:
-- without its lease no load can store its value behind this.
-- KEYS  1 clock  2 marks  3 registry of the keys that are kept near  4 the names that changed
--       5… for each name its lease, its entry and its other place; no KEYS from 5 on: only the processes are told
-- ARGV  1 epoch to begin if the clock or the marks are lost  2… the names
-- returns {for each name that had keys how many entries it had: 0, 1 or 2}, and the clock before this and the new one,
--         '' and '' where no process keeps such keys
-- flags: allow-oom
-- include: clock near

local counts = {}
for i = 5, #KEYS, 3 do
  redis.call('DEL', KEYS[i])
  counts[#counts + 1] = redis.call('UNLINK', KEYS[i + 1], KEYS[i + 2])
end
return {counts, name_changed(KEYS[3], KEYS[4], KEYS[1], KEYS[2], ARGV[1], {unpack(ARGV, 2)})}
