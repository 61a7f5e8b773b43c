-- Deletes entries that a reader found dead, if they are still the same.
-- KEYS  entries
-- ARGV  the first bytes of each entry
-- returns how many were deleted
-- flags: allow-oom

local dead = {}
for i = 1, #KEYS do
  if redis.pcall('GETRANGE', KEYS[i], 0, #ARGV[i] - 1) == ARGV[i] then
    dead[#dead + 1] = KEYS[i]
  end
end
return #dead > 0 and redis.call('UNLINK', unpack(dead)) or 0
