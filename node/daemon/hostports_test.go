package daemon

import (
	"net/netip"
	"reflect"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/datapath/service"
)

func TestHostPorts(t *testing.T) {
	pod := func(name, ip string, phase corev1.PodPhase, ports ...corev1.ContainerPort) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "d", Name: name}, Status: corev1.PodStatus{PodIP: ip, Phase: phase},
			Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Ports: ports}}}}
	}
	port := func(host int32, ip string, proto corev1.Protocol) corev1.ContainerPort {
		return corev1.ContainerPort{ContainerPort: 8080, HostPort: host, HostIP: ip, Protocol: proto}
	}
	inHostNetwork := pod("host", "192.0.2.1", corev1.PodRunning, port(80, "", corev1.ProtocolTCP))
	inHostNetwork.Spec.HostNetwork = true
	moved := pod("moved", "10.244.0.9", corev1.PodRunning, port(83, "0.0.0.0", corev1.ProtocolUDP))
	got := hostPorts("n1", []*corev1.Pod{
		pod("web", "10.244.0.2", corev1.PodRunning, port(80, "", corev1.ProtocolTCP), port(81, "127.0.0.1", corev1.ProtocolTCP),
			port(81, "192.0.2.1", corev1.ProtocolTCP), port(82, "", corev1.ProtocolSCTP), port(82, "::1", corev1.ProtocolTCP), port(0, "", corev1.ProtocolTCP)),
		moved, inHostNetwork,
		pod("done", "10.244.0.3", corev1.PodSucceeded, port(84, "", corev1.ProtocolTCP)),
		pod("early", "", corev1.PodPending, port(85, "", corev1.ProtocolTCP)),
	}, func(p *corev1.Pod) *corev1.PodStatus {
		if p == moved { // the agent knows more than the API
			return &corev1.PodStatus{PodIP: "10.244.0.4", Phase: corev1.PodRunning}
		}
		return nil
	})
	at := func(s string) []service.Backend {
		return []service.Backend{{Addr: netip.MustParseAddrPort(s), Node: "n1"}}
	}
	want := []service.Service{
		{Name: "d/moved hostPort 0.0.0.0:83/UDP", Proto: service.UDP, NodePort: 83, ExternalLocal: true, Backends: at("10.244.0.4:8080")},
		{Name: "d/web hostPort 127.0.0.1:81/TCP", Proto: service.TCP, ExternalLocal: true, Backends: at("10.244.0.2:8080"),
			Frontends: []service.Frontend{{Addr: netip.MustParseAddrPort("127.0.0.1:81")}}},
		{Name: "d/web hostPort 192.0.2.1:81/TCP", Proto: service.TCP, ExternalLocal: true, Backends: at("10.244.0.2:8080"),
			Frontends: []service.Frontend{{Addr: netip.MustParseAddrPort("192.0.2.1:81"), External: true}}},
		{Name: "d/web hostPort :80/TCP", Proto: service.TCP, NodePort: 80, ExternalLocal: true, Backends: at("10.244.0.2:8080")},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
}
