"""What passes and rounds cost on a device: measured, counted, and what a controller decides by."""

from specjax.profiling import machine as machine
from specjax.profiling import roofline as roofline
from specjax.profiling.calibrate import calibrate as calibrate
from specjax.profiling.measure import profile as profile
