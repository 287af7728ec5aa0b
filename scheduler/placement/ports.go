package placement

import v1 "k8s.io/api/core/v1"

const anyIP = "0.0.0.0"

// hostPort is one port that a pod takes on its node.
type hostPort struct {
	ip       string
	protocol v1.Protocol
	port     int32
}

// hostPortsOf lists the host ports of containers that live as long as the
// pod: its containers and its sidecars.
func hostPortsOf(pod *v1.Pod) []hostPort {
	var ports []hostPort
	collect := func(c *v1.Container) {
		for _, p := range c.Ports {
			if p.HostPort <= 0 {
				continue
			}
			hp := hostPort{ip: p.HostIP, protocol: p.Protocol, port: p.HostPort}
			if hp.ip == "" {
				hp.ip = anyIP
			}
			if hp.protocol == "" {
				hp.protocol = v1.ProtocolTCP
			}
			ports = append(ports, hp)
		}
	}
	for i := range pod.Spec.InitContainers {
		c := &pod.Spec.InitContainers[i]
		if c.RestartPolicy != nil && *c.RestartPolicy == v1.ContainerRestartPolicyAlways {
			collect(c)
		}
	}
	for i := range pod.Spec.Containers {
		collect(&pod.Spec.Containers[i])
	}
	return ports
}

// clashes reports whether both cannot be held on one node: the same port and
// protocol on the same address, or on all addresses by one of them.
func (p hostPort) clashes(o hostPort) bool {
	return p.port == o.port && p.protocol == o.protocol &&
		(p.ip == o.ip || p.ip == anyIP || o.ip == anyIP)
}
