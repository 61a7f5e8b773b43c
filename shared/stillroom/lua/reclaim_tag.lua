-- Goes on through the index of a tag, and deletes the entries that carry it and are older than its mark. The entry as it
-- is now decides: one that was written again lives. What is no longer there, or no longer carries the tag, leaves the
-- index. The entries are found in the index, so they are not among KEYS; they are in the slot of those that are.
-- KEYS  1 index  2 clock  3 marks
-- ARGV  1 tag  2 prefix of an entry's key  3 cursor  4 how many to look at, about
-- returns {next cursor, 0 at the end; entries looked at; entries deleted}
-- flags: allow-oom
-- include: clock header

local clock = redis.call('GET', KEYS[2]) or ''
local epoch = string.match(clock, '^(%w+)%.') or ''
local seq = tonumber(redis.call('ZSCORE', KEYS[3], 't:' .. ARGV[1]) or '0')
seq = math.max(seq, tonumber(redis.call('ZSCORE', KEYS[3], '!') or '0'))
local found = redis.pcall('ZSCAN', KEYS[1], ARGV[3], 'COUNT', ARGV[4])
if found.err then
  return {'0', 0, 0} -- no sorted set: as good as none
end
local names, dead, leaving = found[2], {}, {}
for i = 1, #names, 2 do
  local key = ARGV[2] .. names[i]
  local header = read_header(key)
  local carries = header and carries_tag(header, ARGV[1])
  if carries and (header.epoch ~= epoch or header.stamp < seq) then
    dead[#dead + 1] = key
    leaving[#leaving + 1] = names[i]
  elseif not carries then
    leaving[#leaving + 1] = names[i]
  end
end
local AT_ONCE = 1000 -- Lua's stack takes no more
for i = 1, #dead, AT_ONCE do
  redis.call('UNLINK', unpack(dead, i, math.min(i + AT_ONCE - 1, #dead)))
end
for i = 1, #leaving, AT_ONCE do
  redis.call('ZREM', KEYS[1], unpack(leaving, i, math.min(i + AT_ONCE - 1, #leaving)))
end
return {found[1], #names / 2, #dead}
