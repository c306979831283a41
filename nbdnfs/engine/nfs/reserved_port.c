/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "nfs/reserved_port.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>

/* As the kernel's NFS client (sunrpc.min_resvport): below, many are taken, and 623 and 664 are a BMC's (IPMI). */
#define FIRST_PORT 665u
#define LAST_PORT 1023u
#define PORTS (LAST_PORT - FIRST_PORT + 1)

/* TCP ports of services, by IANA's list and /etc/services, and of daemons that use one without either. Ascending. */
static const uint16_t taken[] = {
	666, 667, 674, 687, 688, 691, 694, 695, 700, 701, 702, 705, 706, 707, 709, 710, 711, 712, 715, 729, 730, 731,
	732, 741, 744, 747, 748, 749, 750, 751, 752, 753, 754, 758, 760, 761, 762, 765, 767, 775, 777, 780, 783, 789,
	799, 800, 808, 830, 831, 832, 833, 843, 847, 848, 853, 854, 860, 861, 862, 871, 873, 886, 887, 888, 898, 900,
	901, 902, 903, 910, 911, 912, 913, 950, 953, 981, 987, 989, 990, 991, 992, 993, 994, 995, 996, 1000, 1001,
	1002, 1010, 1021, 1022, 1023,
};

static bool is_taken(uint16_t port)
{
	for (unsigned i = 0; i < sizeof(taken) / sizeof(taken[0]); i++)
		if (taken[i] == port)
			return true;
	return false;
}

static uint32_t any_number(void)
{
	struct timespec now;
	uint32_t number;

	if (getrandom(&number, sizeof(number), GRND_NONBLOCK) == (ssize_t)sizeof(number))
		return number;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint32_t)now.tv_nsec;
}

static int bind_port(int fd, int family, uint16_t port)
{
	struct sockaddr_storage local;
	socklen_t length = family == AF_INET6 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in);

	memset(&local, 0, sizeof(local));
	local.ss_family = (sa_family_t)family;
	if (family == AF_INET6)
		((struct sockaddr_in6 *)&local)->sin6_port = htons(port);
	else
		((struct sockaddr_in *)&local)->sin_port = htons(port);
	return bind(fd, (struct sockaddr *)&local, length);
}

void reserved_port_bind(int fd, int family)
{
	uint32_t start = any_number();

	for (uint32_t i = 0; i < PORTS; i++) {
		uint16_t port = (uint16_t)(FIRST_PORT + (start + i) % PORTS);

		if (is_taken(port))
			continue;
		if (bind_port(fd, family, port) == 0 || errno != EADDRINUSE)
			return;
	}
}
