# blkback in a PV driver domain, for a PV guest beside xl devd, and alone for a PV and a PVH guest.
. /scripts/driver.sh
driver_domain pv
