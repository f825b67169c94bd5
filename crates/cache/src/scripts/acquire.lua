-- ACQUIRE: what a reader that found no usable value may do.
-- KEYS: value, guard, marks. ARGV: token, lease in ms, '1' if the value present is known to be unusable.
-- Returns {'BYPASS'}, {'VALUE', value}, {'WAIT'} or {'GRANT'}.

-- A transaction is about to commit a change: what is loaded now may be old in a moment.
if redis.call('EXISTS', KEYS[3]) == 1 then return {'BYPASS'} end

if ARGV[3] ~= '1' then
    -- A value of another type is an error here and counts as none.
    local value = redis.pcall('GET', KEYS[1])
    if type(value) == 'string' then return {'VALUE', value} end
end

-- The own lease is granted again: the first answer may have been lost on the way.
local lease = 'L' .. ARGV[1]
local guard = redis.pcall('GET', KEYS[2])
if type(guard) == 'string' and guard ~= lease and string.sub(guard, 1, 1) == 'L' then return {'WAIT'} end

redis.call('SET', KEYS[2], lease, 'PX', ARGV[2])
return {'GRANT'}
