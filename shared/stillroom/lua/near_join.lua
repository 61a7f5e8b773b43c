-- Adds prefixes to the registry of the keys of which processes keep copies: see lib/near.lua. Too many prefixes become
-- the empty one, with which every key begins.
-- KEYS  1 registry
-- ARGV  1 id of a new registry  2 how long it is kept when no process joins, ms  3 most prefixes  4… prefixes
-- returns the registry
-- flags: allow-oom
-- include: near

local registry = redis.call('GET', KEYS[1]) or ARGV[1]
local _, count = string.gsub(registry, '\n', '')
for i = 4, #ARGV do
  if not may_be_kept(registry, ARGV[i]) then
    registry, count = registry .. '\n' .. ARGV[i], count + 1
  end
end
if count > tonumber(ARGV[3]) then
  registry = string.match(registry, '^[^\n]*') .. '\n'
end
redis.call('SET', KEYS[1], registry, 'PX', ARGV[2])
return registry
