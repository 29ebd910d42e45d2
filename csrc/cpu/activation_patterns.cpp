#include "lswag/dispatch.h"
