-- Deletes, of these entries, those that carry the tag and are older than its mark. The entry as it is now decides:
-- one that was written again since the index was read lives. What is no longer there, or no longer carries the tag, leaves
-- the index.
-- KEYS  1 index  2 clock  3 marks  4… entries
-- ARGV  1 tag  2 the length of the prefix of an entry's key
-- returns how many were deleted
-- flags: allow-oom
-- include: clock header

local clock = redis.call('GET', KEYS[2]) or ''
local epoch = string.match(clock, '^(%w+)%.') or ''
local seq = tonumber(redis.call('ZSCORE', KEYS[3], 't:' .. ARGV[1]) or '0')
seq = math.max(seq, tonumber(redis.call('ZSCORE', KEYS[3], '!') or '0'))
local deleted, leaving = {}, {}
for i = 4, #KEYS do
  local header = read_header(KEYS[i])
  local carries = header and carries_tag(header, ARGV[1])
  local dead = carries and (header.epoch ~= epoch or header.stamp < seq)
  if dead then
    deleted[#deleted + 1] = KEYS[i]
  end
  if dead or not carries then
    leaving[#leaving + 1] = string.sub(KEYS[i], tonumber(ARGV[2]) + 1)
  end
end
if #deleted > 0 then
  redis.call('UNLINK', unpack(deleted))
end
if #leaving > 0 then
  redis.call('ZREM', KEYS[1], unpack(leaving))
end
return #deleted
