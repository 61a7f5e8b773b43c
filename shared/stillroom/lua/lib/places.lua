-- A key has two places: `e:<key>`, and beside it `e:<key>%other`, for the values of a second release of the app whose
-- types differ. The codec of an entry names its release, `j:<fingerprint>`; `j` alone is for every release.

-- Returns the fingerprint of the entry at a place, '' for every release; nil where no entry lives in this epoch.
local function release_at(key, epoch)
  local text = redis.pcall('GETRANGE', key, 0, 127)
  local its_epoch, release = string.match(
    type(text) == 'string' and text or '', '^1\t(%w+)\t%d+\t%d+\t%d+\t%a:?(%x*)\t')
  return its_epoch == epoch and release or nil
end

-- Returns the place for a loaded value of this release: the one with its own entry, or an empty one, else the one that
-- ends first. Afterwards the release has no entry in the other place.
local function place_of(first, second, release, epoch)
  local there = release_at(first, epoch)
  if release == '' or not there or there == '' or there == release then
    if release ~= '' and release_at(second, epoch) == release then
      redis.call('UNLINK', second)
    end
    return first
  end
  local other = release_at(second, epoch)
  if not other or other == release or redis.call('PTTL', second) <= redis.call('PTTL', first) then
    return second
  end
  return first
end
