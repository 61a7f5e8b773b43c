-- Continues through the index of a tag, and deletes the entries that carry the tag and are older than its mark. The current
-- entry decides: one that was written again lives. A missing entry, or one without the tag, leaves the index.
-- The entries are found in the index, so they are not among KEYS; they are in the slot of KEYS.
--
-- It goes by rank, since neighbours leave the index for a third of the time that ZSCAN and ZREM take. The cursor is the
-- last member that stayed: ranks shift with every write, but a dead member does not move, so none is skipped.
--
-- Other clients wait while it runs, and it runs often, so the caller passes the epoch and the mark. A mark only grows, so
-- an entry that is dead by the mark read at the beginning stays dead; a sweep deletes entries of other epochs.
-- KEYS  1 index
-- ARGV  1 tag  2 prefix of an entry's key  3 cursor, 0 at the beginning  4 how many to look at  5 epoch  6 mark
-- returns {next cursor, 0 at the end; entries looked at; entries deleted}
-- flags: allow-oom
-- include: header

local index, tag, prefix, cursor, most = KEYS[1], ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local epoch, seq = ARGV[5], tonumber(ARGV[6])
local carries = is_among(tag)

-- Returns the rank after the member that stayed; if it has gone or moved, the rank of the first with its score.
local function first_rank()
  local score, name = string.match(cursor, '^(%S+) (.*)$')
  if not score then
    return 0
  end
  if redis.pcall('ZSCORE', index, name) == score then
    return redis.call('ZRANK', index, name) + 1
  end
  local before = redis.pcall('ZCOUNT', index, '-inf', '(' .. score)
  return type(before) == 'number' and before or 0
end

local first = first_rank()
local names, dead, leaving, stayed = redis.pcall('ZRANGE', index, first, first + most - 1), {}, {}, nil
if names.err then
  return {'0', 0, 0} -- a key that is no sorted set counts as empty
end
for i = 1, #names do
  local name, key = names[i], prefix .. names[i]
  local its_epoch, stamp, tags = read_header(key)
  if not tags or not carries(tags) then
    leaving[#leaving + 1] = name
  elseif its_epoch == epoch and stamp < seq then
    leaving[#leaving + 1] = name
    dead[#dead + 1] = key
  else
    stayed = name
  end
end

local AT_ONCE = 1000 -- Lua's stack takes no more
for i = 1, #dead, AT_ONCE do
  redis.call('UNLINK', unpack(dead, i, math.min(i + AT_ONCE - 1, #dead)))
end
local following = stayed and redis.call('ZSCORE', index, stayed) .. ' ' .. stayed
if #names > 0 and not stayed then
  redis.call('ZREMRANGEBYRANK', index, first, first + #names - 1)
else
  for i = 1, #leaving, AT_ONCE do
    redis.call('ZREM', index, unpack(leaving, i, math.min(i + AT_ONCE - 1, #leaving)))
  end
end
if #names < most then
  following = '0'
elseif not following then
  following = cursor == '0' and 'begin' or cursor
end
return {following, #names, #dead}
