package api

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/pkg/controller/certificates/authority"
	"k8s.io/kubernetes/pkg/controller/clusterroleaggregation"
	"k8s.io/kubernetes/pkg/controller/servicecidrs"
	"k8s.io/utils/clock"
)

const (
	// kubernetesService is the name of the Service, in namespace default, that stands for this API.
	kubernetesService = "kubernetes"
	// replicaPoll is how often the list of replicas is looked at. That is a look at memory.
	replicaPoll = time.Second
	// endpointsRecheck is how often the stored endpoints are read to see that nobody changed them.
	endpointsRecheck = time.Minute
)

// RunLeaderHooks does what one server of the cluster at a time should do, until ctx ends: it keeps
// the endpoints of Service default/kubernetes equal to Config.Replicas, fills aggregated ClusterRoles
// (without that the roles admin, edit and view are empty), asks aggregated API servers whether they are available, keeps the tokens in
// Secrets, checks the types in admission policies, keeps ServiceCIDRs in being as long as somebody has an address of theirs, and approves, signs and clears away certificate requests. It writes only when there is
// something to do. decorate is applied to the context of each request, as in Loopback.
func (s *Server) RunLeaderHooks(ctx context.Context, decorate func(context.Context) context.Context) error {
	client, err := kubernetes.NewForConfig(s.Loopback("skein-kubernetes-service", decorate))
	if err != nil {
		return fmt.Errorf("client of the leader: %w", err)
	}
	ca, err := newSigner(s.cfg)
	if err != nil {
		return fmt.Errorf("signer of certificate requests: %w", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { runUpstream(ctx, client, ca); return nil })
	g.Go(func() error { return s.watchAvailability(ctx, decorate) })
	g.Go(func() error { return s.keepTokens(ctx, client, clock.RealClock{}) })
	g.Go(func() error { return s.dropBootstrapTokens(ctx, client) })
	g.Go(func() error { return s.checkPolicies(ctx, client) })
	g.Go(func() error { s.followReplicas(ctx, client); return nil })
	return g.Wait()
}

// runUpstream runs upstream's controllers. They have informers of their own, so that nothing of them is left when ctx ends.
func runUpstream(ctx context.Context, client kubernetes.Interface, ca *authority.CertificateAuthority) {
	f := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(dropManagedFields))
	cidrs := servicecidrs.NewController(ctx, f.Networking().V1().ServiceCIDRs(), f.Networking().V1().IPAddresses(), client)
	roles := clusterroleaggregation.NewClusterRoleAggregation(f.Rbac().V1().ClusterRoles(), client.RbacV1())
	wait := func() {}
	if ca != nil {
		wait = runCertificates(ctx, client, f, ca)
	}
	f.StartWithContext(ctx)
	var others sync.WaitGroup
	others.Go(func() { cidrs.Run(ctx, 1) })
	roles.Run(ctx, 1)
	others.Wait()
	wait()
	f.Shutdown()
}

func (s *Server) followReplicas(ctx context.Context, client kubernetes.Interface) {
	var written []netip.AddrPort
	var checked time.Time
	tick := time.NewTicker(replicaPoll)
	defer tick.Stop()
	for {
		now := sortedReplicas(s.cfg.Replicas())
		// No replica at all cannot be, since this one lives: what is known is better than nothing.
		if len(now) > 0 && (!slices.Equal(now, written) || time.Since(checked) > endpointsRecheck) {
			if err := reconcileKubernetes(ctx, client, s.cfg, now); err == nil {
				written, checked = now, time.Now()
			} else if ctx.Err() == nil {
				s.cfg.Logger.Warn("cannot write the endpoints of Service default/kubernetes", "replicas", len(now), "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func sortedReplicas(r []netip.AddrPort) []netip.AddrPort {
	r = slices.Clone(r)
	slices.SortFunc(r, netip.AddrPort.Compare)
	return slices.Compact(r)
}

func reconcileKubernetes(ctx context.Context, client kubernetes.Interface, cfg *Config, replicas []netip.AddrPort) error {
	if err := ensureServices(ctx, client, cfg); err != nil {
		return err
	}
	if err := reconcileEndpoints(ctx, client, kubernetesEndpoints(replicas)); err != nil {
		return err
	}
	return reconcileSlices(ctx, client, kubernetesSlices(replicas))
}

// kubernetesEndpoints is the Endpoints object of old clients: a subset a port.
func kubernetesEndpoints(replicas []netip.AddrPort) *corev1.Endpoints {
	e := &corev1.Endpoints{ObjectMeta: metav1.ObjectMeta{
		Namespace: metav1.NamespaceDefault, Name: kubernetesService,
		Labels: map[string]string{discoveryv1.LabelSkipMirror: "true"}, // its slices are written below
	}}
	byPort := map[uint16][]corev1.EndpointAddress{}
	for _, r := range replicas {
		byPort[r.Port()] = append(byPort[r.Port()], corev1.EndpointAddress{IP: r.Addr().String()})
	}
	for _, port := range slices.Sorted(maps.Keys(byPort)) {
		e.Subsets = append(e.Subsets, corev1.EndpointSubset{Addresses: byPort[port],
			Ports: []corev1.EndpointPort{{Name: "https", Port: int32(port), Protocol: corev1.ProtocolTCP}}})
	}
	return e
}

// kubernetesSlices is one EndpointSlice a family and port, named as upstream does when there is one.
func kubernetesSlices(replicas []netip.AddrPort) []*discoveryv1.EndpointSlice {
	var out []*discoveryv1.EndpointSlice
	byName := map[string]*discoveryv1.EndpointSlice{}
	for _, r := range replicas { // sorted: IPv4 first
		family := discoveryv1.AddressTypeIPv4
		if r.Addr().Is6() {
			family = discoveryv1.AddressTypeIPv6
		}
		group := string(family) + strconv.Itoa(int(r.Port()))
		s := byName[group]
		if s == nil {
			name := kubernetesService
			if len(out) > 0 {
				name = fmt.Sprintf("%s-%s-%d", kubernetesService, map[bool]string{true: "6", false: "4"}[r.Addr().Is6()], r.Port())
			}
			s = &discoveryv1.EndpointSlice{
				ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceDefault, Name: name,
					Labels: map[string]string{discoveryv1.LabelServiceName: kubernetesService}},
				AddressType: family,
				Ports:       []discoveryv1.EndpointPort{{Name: ptr("https"), Port: ptr(int32(r.Port())), Protocol: ptr(corev1.ProtocolTCP)}},
			}
			byName[group] = s
			out = append(out, s)
		}
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{r.Addr().String()},
			Conditions: discoveryv1.EndpointConditions{Ready: ptr(true)}})
	}
	return out
}

func ptr[T any](v T) *T { return &v }

func reconcileEndpoints(ctx context.Context, client kubernetes.Interface, want *corev1.Endpoints) error {
	api := client.CoreV1().Endpoints(want.Namespace)
	have, err := api.Get(ctx, want.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		_, err = api.Create(ctx, want, metav1.CreateOptions{})
	case err == nil && !equality.Semantic.DeepEqual(have.Subsets, want.Subsets):
		have.Subsets, have.Labels = want.Subsets, want.Labels
		_, err = api.Update(ctx, have, metav1.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("Endpoints %s/%s: %w", want.Namespace, want.Name, err)
	}
	return nil
}

func reconcileSlices(ctx context.Context, client kubernetes.Interface, want []*discoveryv1.EndpointSlice) error {
	api := client.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault)
	list, err := api.List(ctx, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=" + kubernetesService})
	if err != nil {
		return fmt.Errorf("EndpointSlices of Service default/kubernetes: %w", err)
	}
	have := map[string]*discoveryv1.EndpointSlice{}
	for i := range list.Items {
		have[list.Items[i].Name] = &list.Items[i]
	}
	for _, w := range want {
		h := have[w.Name]
		delete(have, w.Name)
		if h != nil && h.AddressType != w.AddressType { // it cannot be changed
			if err := api.Delete(ctx, h.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
				return fmt.Errorf("EndpointSlice default/%s: %w", h.Name, err)
			}
			h = nil
		}
		switch {
		case h == nil:
			_, err = api.Create(ctx, w, metav1.CreateOptions{})
		case !equality.Semantic.DeepEqual(h.Endpoints, w.Endpoints) || !equality.Semantic.DeepEqual(h.Ports, w.Ports):
			h.Endpoints, h.Ports = w.Endpoints, w.Ports
			_, err = api.Update(ctx, h, metav1.UpdateOptions{})
		}
		if err != nil {
			return fmt.Errorf("EndpointSlice default/%s: %w", w.Name, err)
		}
	}
	for name := range have {
		if err := api.Delete(ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("EndpointSlice default/%s: %w", name, err)
		}
	}
	return nil
}
