-- Take what a request may use from all its counters, or from none of them.
-- KEYS[i] is a counter; ARGV[4i-3 .. 4i] its kind, limit, amount and time to live in seconds.
--   bucket: refills `limit` a minute, holds at most `limit`; a larger amount passes when it is full and leaves a debt
--   budget: what is spent so far; passes while anything is left, so that it is overspent by one request at most
-- Returns {index of the counter that refused or 0, seconds until it would pass, what is left in each counter ...}.
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local levels, refused, wait = {}, 0, 0

for i, key in ipairs(KEYS) do
  local kind, limit, amount = ARGV[4 * i - 3], tonumber(ARGV[4 * i - 2]), tonumber(ARGV[4 * i - 1])
  local held = redis.call('HMGET', key, 'n', 't')
  if kind == 'bucket' then
    levels[i] = limit
    if held[1] and held[2] then levels[i] = math.min(limit, held[1] + (now - held[2]) * limit / 60) end
    local needed = math.min(amount, limit)
    if refused == 0 and levels[i] < needed then
      refused, wait = i, (needed - levels[i]) * 60 / limit
    end
  else
    levels[i] = limit - (held[1] or 0)
    if refused == 0 and levels[i] <= 0 then refused = i end
  end
end

if refused == 0 then
  for i, key in ipairs(KEYS) do
    local amount, ttl = tonumber(ARGV[4 * i - 1]), ARGV[4 * i]
    levels[i] = levels[i] - amount
    if ARGV[4 * i - 3] == 'bucket' then
      redis.call('HSET', key, 'n', tostring(levels[i]), 't', string.format('%.6f', now))
    else
      redis.call('HINCRBYFLOAT', key, 'n', amount)
    end
    redis.call('EXPIRE', key, ttl)
  end
end

local answer = {refused, tostring(wait)}
for i = 1, #KEYS do answer[i + 2] = tostring(levels[i]) end
return answer
