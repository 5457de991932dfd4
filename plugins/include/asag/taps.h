// The cells of a map that a bilinear sample is made of, with zeros outside.
#pragma once

#include "asag/platform.h"

namespace asag {

// The four cells round a point on one level.
struct SampleTaps {
    int cell[4];  // row * width + column
    float weight[4];
};

// Of a point in cells, where a whole number is the centre of a cell.  One that is not finite has zeros for weights.
ASAG_HD inline SampleTaps taps_round(float column, float row, float weight, int height, int width) {
    const float left = floorf(column), top = floorf(row);
    const float across = sub(column, left), down = sub(row, top);
    const float last_x = static_cast<float>(width - 1), last_y = static_cast<float>(height - 1);
    SampleTaps taps;
    for (int corner = 0; corner < 4; ++corner) {
        const bool right = (corner & 1) != 0, bottom = (corner & 2) != 0;
        const float at_x = right ? left + 1.0f : left, at_y = bottom ? top + 1.0f : top;
        const bool inside = at_x >= 0.0f && at_x <= last_x && at_y >= 0.0f && at_y <= last_y;
        const float share = (right ? across : 1.0f - across) * (bottom ? down : 1.0f - down);
        // Clamped while it is a float: far out it would not fit into an int.
        const int cell_x = static_cast<int>(smaller(larger(at_x, 0.0f), last_x));
        const int cell_y = static_cast<int>(smaller(larger(at_y, 0.0f), last_y));
        taps.cell[corner] = cell_y * width + cell_x;
        taps.weight[corner] = inside ? share * weight : 0.0f;
    }
    return taps;
}

}  // namespace asag
