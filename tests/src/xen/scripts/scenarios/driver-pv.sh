# blkback in a PV driver domain, for a PV guest beside xl devd, and for a PVH guest alone.
. /scripts/driver.sh
driver_domain pv
